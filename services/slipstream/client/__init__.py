"""A client of OpenAI's API: what the command and the load tests ask servers with."""
