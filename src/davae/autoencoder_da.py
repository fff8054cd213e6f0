"""Where `AutoencoderDA` was before 0.2: imports and portable folders of that time still find it here."""

from davae.models.autoencoder_da import AutoencoderDA as AutoencoderDA
