"""An OpenAI-compatible service over one engine: ``body`` is a question, ``worker`` the engine's thread, ``answer`` the reply."""
