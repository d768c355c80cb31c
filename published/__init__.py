"""Other people's formats: configs, keywords and weights of published code, in and out."""
