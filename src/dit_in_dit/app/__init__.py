"""The page of `dit-in-dit app`: draw samples, look inside, design a model, follow runs, look at data.

Each screen has two modules: NAME.py does the work without gradio, NAME_screen.py has the fields and events.
"""
