mock_provider "aws" {
  source = "../mocks"
}

variables {
  name             = "test"
  vpc_id           = "vpc-1"
  public_subnet_id = "subnet-1"
  nodes = {
    one   = ["kafka", "zookeeper"]
    two   = ["zookeeper", "kafka"]
    three = ["spark_worker"]
  }
  traffic = [
    { from = "admin", to = "bastion", ports = ["22"], why = "in" },
    { from = "bastion", to = "node", ports = ["22"], why = "shells" },
    { from = "kafka", to = "kafka", ports = ["9092", "29092"], why = "copies" },
    { from = "spark_worker", to = "kafka", ports = ["9092"], why = "reads" },
    { from = "spark_worker", to = "spark_worker", ports = ["7100-7131"], why = "shuffles" },
    { from = "node", to = "internet", ports = ["443"], why = "packages" },
  ]
  lake_groups      = ["spark_worker"]
  lake             = { bucket_arn = "arn:aws:s3:::lake", key_arn = "arn:aws:kms:us-east-1:123456789012:key/lake" }
  admin_cidrs      = ["203.0.113.7/32", "198.51.100.0/24"]
  admin_public_key = "ssh-ed25519 AAAA admin"
  bastion          = { ami_id = "ami-12345678", type = "t3.nano" }
}

run "rules" {
  assert {
    condition     = toset(keys(aws_security_group.this)) == toset(["bastion", "kafka-zookeeper", "spark_worker"])
    error_message = "nodes with the same groups share a security group"
  }
  assert {
    condition = toset(keys(aws_vpc_security_group_ingress_rule.between)) == toset([
      "bastion to kafka-zookeeper 22", "bastion to spark_worker 22", "kafka-zookeeper to kafka-zookeeper 9092",
      "kafka-zookeeper to kafka-zookeeper 29092", "spark_worker to kafka-zookeeper 9092", "spark_worker to spark_worker 7100-7131",
    ])
    error_message = "each line of the table, and nothing else"
  }
  assert {
    condition     = keys(aws_vpc_security_group_ingress_rule.between) == keys(aws_vpc_security_group_egress_rule.between)
    error_message = "what may come in may also be sent"
  }
  assert {
    condition     = toset([for rule in aws_vpc_security_group_ingress_rule.admin : rule.cidr_ipv4]) == toset(var.admin_cidrs)
    error_message = "only the stated networks, to the bastion"
  }
  assert {
    condition = (
      aws_vpc_security_group_ingress_rule.between["spark_worker to spark_worker 7100-7131"].from_port == 7100 &&
      aws_vpc_security_group_ingress_rule.between["spark_worker to spark_worker 7100-7131"].to_port == 7131
    )
    error_message = "a range is a range"
  }
  assert {
    condition     = toset(keys(aws_vpc_security_group_egress_rule.internet)) == toset(["kafka-zookeeper to internet 443", "spark_worker to internet 443"])
    error_message = "the bastion of this table does not fetch packages"
  }
}

run "rights" {
  assert {
    condition     = jsonencode(output.instance_profiles) == jsonencode({ one = null, two = null, three = "test-lake" })
    error_message = "nodes that do not use the lake have no rights"
  }
  assert {
    condition = alltrue([
      for statement in data.aws_iam_policy_document.lake.statement : length(setintersection(statement.resources, ["*"])) == 0 &&
      alltrue([for action in statement.actions : !strcontains(action, "*") && !strcontains(action, "Version")])
    ])
    error_message = "named actions on named things, and none that removes old versions"
  }
  assert {
    condition     = aws_instance.bastion.metadata_options[0].http_tokens == "required" && aws_instance.bastion.root_block_device[0].encrypted
    error_message = "IMDSv2 and an encrypted disk"
  }
}

run "traffic_from_admin_to_internet" {
  command = plan
  variables {
    traffic = [{ from = "admin", to = "internet", ports = ["22"], why = "nothing" }]
  }
  expect_failures = [var.traffic]
}
