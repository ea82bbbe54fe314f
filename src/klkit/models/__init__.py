"""Models: the contract, exact automata, n-grams, transformations, Hugging Face models, and the laws all obey."""
