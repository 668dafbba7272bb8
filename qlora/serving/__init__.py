"""`task=serve`: an endpoint that speaks OpenAI's protocol, with one thread that answers by slots."""
