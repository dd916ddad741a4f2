"""XNOR and popcount on words of 32 bits; nothing here knows of networks."""
