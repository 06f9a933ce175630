"""A recipe's data: splits of images or texts, ready for `Trainer`."""

from hf_trim.data.arguments import DataArguments
from hf_trim.data.device_images import DeviceImages
from hf_trim.data.embedded import package_folder
from hf_trim.data.load import load_data, read_data
from hf_trim.data.prepared import Data


__all__ = ["Data", "DataArguments", "DeviceImages", "load_data", "package_folder", "read_data"]
