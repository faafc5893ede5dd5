"""Models, adapters, data and Trainers of Hugging Face; otherwise only the commands and the demo import its packages."""
