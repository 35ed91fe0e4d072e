"""Where records go. ``protocol.py`` says what a sink is, ``targets.py`` which sink a path or function stands for."""
