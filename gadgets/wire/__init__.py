"""The MRD/Gadgetron streaming protocol: ids, framing, codec and the legal order of messages."""
