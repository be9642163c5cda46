# The platform, as the drawing in the README has it. An environment gives it the variables.

locals {
  prices  = yamldecode(file("${path.module}/../prices.yaml"))
  traffic = yamldecode(file("${path.module}/../traffic.yaml"))
  groups = [
    "zookeeper", "kafka", "hdfs_namenode", "hdfs_datanode", "spark_master", "spark_worker", "postgres", "airflow", "pipeline",
    "monitoring",
  ]
  letters = ["a", "b", "c"]
  zones   = zipmap(local.letters, slice(coalesce(var.zones, one(data.aws_availability_zones.region[*].names)), 0, 3))
  ami     = coalesce(var.ami_id, one(data.aws_ami.debian[*].id))
}

# Not every account has a zone that ends in a.
data "aws_availability_zones" "region" {
  count = var.zones == null ? 1 : 0

  filter {
    name   = "opt-in-status"
    values = ["opt-in-not-required"]
  }

  lifecycle {
    postcondition {
      condition     = length(self.names) >= 3
      error_message = "region: ${var.region} has fewer than three zones; give one with three, or name a zone more than once in zones."
    }
  }
}

# Debian's own account, the same in every region.
data "aws_ami" "debian" {
  count       = var.ami_id == null ? 1 : 0
  owners      = ["136693071363"]
  most_recent = true

  filter {
    name   = "name"
    values = ["debian-13-amd64-*"]
  }
  filter {
    name   = "virtualization-type"
    values = ["hvm"]
  }
}

module "network" {
  source        = "../modules/network"
  name          = var.name
  cidr          = var.network_cidr
  zones         = local.zones
  nat_gateways  = var.nat_gateways
  flow_log_days = var.flow_log_days
}

module "lake" {
  source             = "../modules/lake"
  name               = var.name
  prefix             = var.lake_prefix
  keep_versions_days = var.lake_keep_versions_days
}

module "access" {
  source           = "../modules/access"
  name             = var.name
  vpc_id           = module.network.vpc_id
  public_subnet_id = module.network.public_subnets["a"]
  nodes            = { for node, settings in var.nodes : node => settings.groups }
  traffic          = [for row in local.traffic : merge(row, { ports = [for port in row.ports : tostring(port)] })]
  lake_groups      = ["spark_master", "spark_worker", "pipeline", "airflow"]
  lake             = { bucket_arn = module.lake.bucket_arn, key_arn = module.lake.key_arn }
  admin_cidrs      = var.admin_cidrs
  admin_public_key = var.admin_public_key
  bastion          = { ami_id = local.ami, type = local.prices.bastion.type }
}

module "nodes" {
  source   = "../modules/nodes"
  name     = var.name
  ami_id   = local.ami
  key_name = module.access.key_name
  nodes = {
    for node, settings in var.nodes : node => {
      type             = local.prices.sizes[settings.size].type
      subnet_id        = module.network.private_subnets[settings.zone]
      zone             = module.network.zones[settings.zone]
      root_gib         = settings.root_gib
      disks            = settings.disks
      security_group   = module.access.security_groups[node]
      instance_profile = module.access.instance_profiles[node]
    }
  }
}
