"""GPT-2 as OpenAI published it: read."""
