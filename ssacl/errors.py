"""The named errors of the project. Each message says what is wrong, what was expected and what to do next.

Messages never hold patient data: no header values, no report text, no pixel data.
"""


class SSACLError(Exception):
    """Root of every error that a user can cause or mend; the command line prints it as one line and exits 1."""


class ConfigError(SSACLError):
    """A configuration key is unknown, a value is out of range, or two values contradict each other."""


class DataError(SSACLError):
    """A data set, shard, index or report file is missing, damaged or empty."""


class ImageError(DataError):
    """An image or DICOM file cannot be read as a frontal chest radiograph."""


class SplitError(DataError):
    """A split was asked for by code that must not read it (the test split and the truth, by training)."""


class StorageError(SSACLError):
    """Object storage or the disk refused, timed out, is full, or holds something damaged."""


class CheckpointError(SSACLError):
    """A checkpoint is incomplete, damaged, or made for another architecture or tokenizer."""


class TrainingError(SSACLError):
    """Training stopped: a loss is not finite, a collective hangs, or a worker is lost for good."""


class GenerationError(SSACLError):
    """Text cannot be generated: no language model in the checkpoint, or the time limit was reached."""


class ServeError(SSACLError):
    """The endpoint cannot start or cannot be reached."""


class ClusterError(SSACLError):
    """A Ray cluster cannot be reached, runs another version, or lacks what a job needs (room, a secret, a graphics driver)."""


class RegistryError(SSACLError):
    """A model version or channel is unknown, damaged, or not signed as it must be."""
