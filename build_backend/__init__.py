"""How fastfs is built: PEP 517 hooks around setuptools, and a build_ext that compiles the native core with ninja."""
