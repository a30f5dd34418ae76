"""Sends what was received and committed on to a next OTLP endpoint.

    acknowledged ─▶ queue in memory ─▶ spool: a file for each request ─▶ next hop

- Only requests that were committed here are sent on, as the bytes that came (JSON as the protobuf that it was converted
  to), whole: also where single points went to quarantine. Credentials of the client are not.
- The next hop gets each request at least once, in the order of their commits. It has to drop duplicates, as we do.
- Nothing here delays or fails an acknowledgement. So a request that is acknowledged and still in the queue when the
  process is killed is not sent on; an orderly end writes the queue out first. Files survive the process, and without
  fsync not always the machine's loss of power.
- The spool is bounded. Past its limit the oldest requests are dropped, as are new ones where the disk takes none: told
  in the log as errors, and counted.
- A request that is too large for the next hop is sent in parts (`splitting`). They are in memory alone: the spool has
  the whole until the last one is acknowledged, so a crash in between loses nothing and repeats some.
- A request that takes longer than the next hop or we wait, while it answers others, gets more time, then is sent in
  parts, too; without an end one slow request would hold up all behind it. Where the next hop is silent all wait.
- A request that the next hop refuses for good is dropped, told and counted. Where a person has to mend something there
  (credentials, address) everything waits.
"""

from tallymark_collector.forwarding.forwarder import Forwarder, forwarding

__all__ = ["Forwarder", "forwarding"]
