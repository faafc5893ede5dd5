"""Models, adapters and data of Hugging Face: with the commands, the only room that imports its libraries."""
