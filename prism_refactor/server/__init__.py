"""An OpenAI-compatible HTTP server over the engine, where every request has its own k."""
