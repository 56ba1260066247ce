"""What does the sample set look like?"""
