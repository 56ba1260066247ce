"""Where did it change?"""
