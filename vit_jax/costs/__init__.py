"""FLOPs and parameters of models, and the data sheets of accelerators."""
