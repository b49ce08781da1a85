"""How the embedded model is made and measured: drawn data, training, judges, export."""
