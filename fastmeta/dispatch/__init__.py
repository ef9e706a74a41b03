"""How an op finds its kernel: what an op is, how it is registered, which backend runs it."""
