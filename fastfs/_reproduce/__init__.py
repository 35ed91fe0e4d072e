"""The demo and the reproduction of the paper. They import the rest of fastfs, which never imports them."""
