"""The command line: the one place that puts the collector's parts together. Nothing is decided here.

    app         the commands, and what every error becomes
    serve       tallymark serve
    demo        tallymark demo
    usage       tallymark usage
    invoice     tallymark invoice
    plans       tallymark plans check | apply
    audit       tallymark audit
    quarantine  tallymark quarantine list | show | history
    settle      tallymark quarantine release | attribute | discard | reopen
    database    tallymark migrate, tallymark status
    arguments   options that several commands have, and how times are read
    opening     which database is meant, whether it is there and migrated
    output      tables, JSON, CSV on stdout; sentences and progress on stderr
    redaction   no password is ever printed

What a command was asked for goes to stdout, everything else to stderr. Exit statuses stand in `app.STATUSES`.
"""
