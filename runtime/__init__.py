"""What does a long run on any machine need?"""
