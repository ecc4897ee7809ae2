"""An OpenAI-compatible service over one engine: ``body`` is the question, ``worker`` the engine's thread, ``answer`` the reply."""
