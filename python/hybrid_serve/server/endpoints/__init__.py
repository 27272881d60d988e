"""One module a family of routes: parse, prompt, ``client.generate``, format."""
