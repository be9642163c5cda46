provider "aws" {
  region = local.region
  default_tags {
    tags = merge({ Project = "clickstream", Environment = local.name }, local.tags)
  }
}
