import importlib.metadata
import subprocess
import sys

import tallymark


def test_public_names() -> None:
    assert tallymark.__all__ == [
        "DeclarationError",
        "SettingsError",
        "TallymarkError",
        "configure",
        "flush",
        "identify",
        "record",
        "shutdown",
        "track_usage",
        "usage",
    ]
    assert all(hasattr(tallymark, name) for name in tallymark.__all__)
    assert tallymark.__version__ == importlib.metadata.version("tallymark")


def test_a_process_that_will_fork_starts_no_thread_and_no_channel() -> None:
    source = (
        "import sys, threading, tallymark; assert 'grpc' not in sys.modules\n"
        "import grpc; grpc.insecure_channel = None\n"
        "tallymark.configure(); assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", source], check=True)
