"""The prototypes' moving average and its class sums (method page, section 2)."""
