# One small machine with everything on it, the topology `single`.

locals {
  name   = "clickstream-dev"
  region = "us-east-1"
  tags   = {}
}

module "platform" {
  source           = "../../platform"
  name             = local.name
  region           = local.region
  admin_cidrs      = var.admin_cidrs
  admin_public_key = var.admin_public_key
  ami_id           = var.ami_id

  network_cidr             = "10.20.0.0/16"
  nat_gateways             = 1
  flow_log_days            = 7
  kafka_replication_factor = 1
  lake_prefix              = "lake"
  lake_keep_versions_days  = 3

  nodes = {
    clickstream = {
      groups = ["zookeeper", "kafka", "spark_master", "spark_worker", "postgres", "airflow", "pipeline"]
      size   = "small"
      zone   = "a"
      disks = {
        kafka    = { size_gib = 50, mount = "/var/lib/kafka", letter = "f" }
        postgres = { size_gib = 20, mount = "/var/lib/postgresql", letter = "g" }
      }
    }
  }

  # As ansible/inventories/single has them.
  inventory_variables = {
    pipeline_stream_services = { ecom-streams = ["bronze", "silver", "gold", "gold_hourly"] }
    pipeline_watermark       = "2 minutes"
    pipeline_driver_memory   = "512m"
    pipeline_executor_memory = "768m"
    spark_worker_memory      = "2g"
    spark_worker_memory_max  = "3G"
    airflow_parallelism      = 2
  }
}
