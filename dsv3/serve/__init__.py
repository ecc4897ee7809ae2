"""An OpenAI-compatible service over one engine: ``body`` what is asked, ``worker`` the engine's thread, ``answer`` what goes back."""
