"""Makes the modules beside this file importable by every test: fakes, tiny models, harnesses."""
