"""Slipstream beside other servers, on the same cores, with the same client and the same prompts."""
