"""Models, adapters, data and Trainers of Hugging Face: only this room and the commands import its libraries."""
