"""Model families behind one protocol: one file per family, and loading."""
