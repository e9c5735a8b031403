"""Measurements that ship with the package: `fldist bench`. Nothing but the command line imports them."""
