"""From a keyword, or a folder of pictures, to a captioned dataset: what prepare_data.py does."""
