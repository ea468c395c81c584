"""The suite's pieces in a loop of your own, with Lightning Fabric: one file for each, docs/fabric.md tells of them."""
