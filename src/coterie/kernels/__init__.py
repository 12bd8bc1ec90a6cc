"""Compiled CPU kernels, written once over the vector operations of `coterie.kernels.vector`."""
