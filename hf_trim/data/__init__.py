"""A recipe's data: two splits of images or texts, ready for `Trainer`."""

from hf_trim.data.arguments import Data, DataArguments, load_data, package_folder
from hf_trim.data.device_images import DeviceImages


__all__ = ["Data", "DataArguments", "DeviceImages", "load_data", "package_folder"]
