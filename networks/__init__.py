"""What is the model made of?"""
