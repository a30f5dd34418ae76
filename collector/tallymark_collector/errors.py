"""Every error that the collector raises on purpose.

    CollectorError
    ├── PermanentError          the same input would fail again: do not retry
    │   ├── MalformedRequest    bytes that are not the OTLP message they claim to be
    │   ├── TooLarge            more bytes or values than one request may have
    │   ├── UnsupportedMedia    a content type or encoding that nobody here reads
    │   ├── Unauthenticated     no credential, or one that is unknown, expired or revoked
    │   ├── Forbidden           a good credential that is not for this
    │   ├── NotPossible         what is asked for cannot be done here, or not with this
    │   ├── TakesTooLong        a question whose answer takes longer than one may
    │   └── UserError           a setting, argument or file that a person has to mend
    │       └── NotThere        the name of something that there is not
    └── TransientError          the same input may succeed later: retry after a delay
        ├── StoreUnavailable    the database is away, read-only, full or out of connections
        ├── SlowBody            a request that did not arrive whole in time
        └── Overloaded          more is under way than the limits allow

Which status code each of them becomes stands in one table, `receivers.status`.
"""


class CollectorError(Exception):
    """Root of the tree; its text is meant for a person."""


class PermanentError(CollectorError):
    """The same input would fail again."""


class MalformedRequest(PermanentError):  # noqa: N818 - named for what arrived, like the status it becomes
    """The request's bytes are not the message that the method takes."""


class TooLarge(PermanentError):  # noqa: N818
    """One request is larger than the limits allow, after decompression."""


class UnsupportedMedia(PermanentError):  # noqa: N818
    """The request's content type or encoding is not one that is read here."""


class Unauthenticated(PermanentError):  # noqa: N818 - named like the status it becomes
    """Nobody knows who asks. The text never repeats what was sent. Where a credential cannot be looked up now, that is
    a TransientError instead: clients throw away what is answered with this."""


class Forbidden(PermanentError):  # noqa: N818
    """It is known who asks, and that they may not."""


class NotPossible(PermanentError):  # noqa: N818
    """The state of things forbids what was asked, not the way it was asked; the text says what would change that."""


class TakesTooLong(PermanentError):  # noqa: N818
    """A question was given up; a narrower one may be answered."""


class UserError(PermanentError):
    """Something that a person gave (setting, argument, file) is wrong; the text says what, where and what to do."""


class NotThere(UserError):  # noqa: N818
    """There is nothing of the name that was given."""


class TransientError(CollectorError):
    """The same input may succeed later."""

    retry_after = 1.0
    """Seconds that a client should wait before it tries again."""


class StoreUnavailable(TransientError):  # noqa: N818
    """The database did not take the write; nothing of it was kept."""

    away = False
    """No server answered at all: another request would fare no better now."""


class SlowBody(TransientError):  # noqa: N818
    """The request did not arrive whole in time; over a better connection it may."""


class Overloaded(TransientError):  # noqa: N818
    """Accepting the request would pass a limit on memory or concurrency."""
