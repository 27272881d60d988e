"""Text on the API server's side: ids from text, text from ids, prompts from conversations. No torch, no HTTP."""
