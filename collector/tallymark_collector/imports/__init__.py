"""Usage out of files: access logs and events, each line billed once, whatever is read again.

lines.py          bytes to lines and records: bounded, with numbers and offsets; gzip or not
access_log.py     one line of an access log to its fields
formats.py        a record to its fields, by the mapping's format
mapping.py        which fields are the time, the account, quantities: a YAML file, checked as a whole
times.py          a text to an instant
routes.py         a path to a route's template
extraction.py     fields to what they bill, or why not
identity.py       what tells a line from every other of its source, whatever file it stands in
rejects.py        the lines that could not be read, to be mended and imported again
importer.py       all of it, a piece at a time; how far it got is committed with the points of the piece
"""
