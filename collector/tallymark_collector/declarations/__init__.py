"""What a code base meters, found without running it, and how that fits its plans.

    sources = read_sources([Path("service")])                 # files, parsed; what cannot be read is a problem
    uses = [use for source in sources.files for use in uses_in(source, sources)]
    problems = compare(uses, catalog)

`api` is the one table of what the SDK's functions are called and which units they mean; `names` follows imports,
aliases and constants; `scanner` finds the calls; `comparison` says what does not fit.
"""

from tallymark_collector.declarations.comparison import Finding, Meter, Severity, compare, meters_of
from tallymark_collector.declarations.scanner import Use, uses_in
from tallymark_collector.declarations.sources import Sources, read_sources

__all__ = ["Finding", "Meter", "Severity", "Sources", "Use", "compare", "meters_of", "read_sources", "uses_in"]
