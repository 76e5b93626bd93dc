"""FLOPs and parameters of models by formula, and the data sheets of accelerators."""
