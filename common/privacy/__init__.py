"""What a schedule costs, which noise it needs, where the noise comes from, and what may be said of
it.
"""
