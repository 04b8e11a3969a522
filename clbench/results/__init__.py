"""Raw results and what is computed from them; imports neither torch nor transformers."""
