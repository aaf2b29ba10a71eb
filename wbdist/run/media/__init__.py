"""What a run can log beside numbers and text: histograms, images, tables, pages of HTML."""
