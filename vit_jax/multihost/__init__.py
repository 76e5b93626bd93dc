"""The processes of a run: how they find each other, notice a lost peer, and stop on a signal."""
